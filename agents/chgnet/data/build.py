"""Makes ``chgnet-0.3.0.npz``: ``python -m crystaljax.agents.chgnet.data.build``; needs the PyPI packages ``chgnet`` and
``torch``.

The weights are those in the wheel of ``chgnet`` (checked with 0.4.2), renamed and transposed, and nothing else.
"""

from __future__ import annotations

import numpy as np

from crystaljax.agents.chgnet.model import BLOCKS
from crystaljax.agents.chgnet.weights import FILE

BASES = {"bond_basis_expansion.rbf_expansion_ag": "atom_basis", "bond_basis_expansion.rbf_expansion_bg": "bond_basis"}
LINEAR = {
    "bond_embedding": "bond_embedding",
    "bond_weights_ag": "atom_weights",
    "bond_weights_bg": "bond_weights",
    "angle_embedding": "angle_embedding",
}


def convert(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The PyTorch model's state as parameters of :class:`crystaljax.agents.chgnet.model.CHGNet`, keyed by path."""
    found: dict[str, np.ndarray] = {}

    def dense(new: str, old: str, bias: bool = True) -> None:
        found[f"{new}/kernel"] = state[f"{old}.weight"].T
        if bias:
            found[f"{new}/bias"] = state[f"{old}.bias"]

    def norm(new: str, old: str) -> None:
        found[f"{new}/scale"], found[f"{new}/bias"] = state[f"{old}.weight"], state[f"{old}.bias"]

    def gated(new: str, old: str, layers: tuple[int, ...]) -> None:
        for branch, normed in (("core", "bn1"), ("gate", "bn2")):
            for name, layer in zip(("first", "second"), layers, strict=False):
                dense(f"{new}/{branch}/{name}", f"{old}.mlp_{branch}.layers.{layer}")
            norm(f"{new}/{branch}/norm", f"{old}.{normed}")

    found["references"] = state["composition_model.fc.weight"][0]
    found["embedding/embedding"] = state["atom_embedding.embedding.weight"]
    for old, new in BASES.items():
        found[f"trunk/{new}/frequencies"] = state[f"{old}.frequencies"]
    found["trunk/angle_basis/frequencies"] = state["angle_basis_expansion.fourier_expansion.frequencies"]
    for old, new in LINEAR.items():
        dense(f"trunk/{new}", old, bias=False)
    for block in range(BLOCKS):
        gated(f"trunk/atom_gate_{block}", f"atom_conv_layers.{block}.twoBody_atom", (0, 3))
        dense(f"trunk/atom_out_{block}", f"atom_conv_layers.{block}.mlp_out.layers.1", bias=False)
    for block in range(BLOCKS - 1):
        gated(f"trunk/bond_gate_{block}", f"bond_conv_layers.{block}.twoBody_bond", (0, 3))
        dense(f"trunk/bond_out_{block}", f"bond_conv_layers.{block}.mlp_out.layers.1", bias=False)
    for block in range(BLOCKS - 2):
        gated(f"trunk/angle_gate_{block}", f"angle_layers.{block}.twoBody_bond", (1,))
    norm("trunk/norm", "readout_norm")
    for new, old in enumerate((0, 2, 4, 7)):
        dense(f"energy_{new}", f"mlp.layers.{old}")
    return {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}


if __name__ == "__main__":
    from chgnet.model import CHGNet

    model = CHGNet.load(model_name="0.3.0", use_device="cpu")
    np.savez(FILE, **convert({name: value.numpy() for name, value in model.state_dict().items()}))
    print(f"wrote {FILE.name}, {FILE.stat().st_size} bytes")
