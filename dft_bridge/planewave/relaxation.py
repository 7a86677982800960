"""Relaxation of cell and atoms: BFGS on the host, one small matrix per crystal, SCFs in batches. Hartree units."""

from __future__ import annotations

import dataclasses

import numpy as np

_STRAIN_STIFFNESS = 0.01
"""Ha/bohr^3 (300 GPa): first guess of the elastic constants."""
_ATOM_STIFFNESS = 0.1
"""Ha/bohr^2: first guess of the force constants."""
_LARGEST_STRAIN, _LARGEST_MOVE = 0.04, 0.3
"""Of one step; the second in bohr."""
_CURVATURE_FLOOR = 1e-3


@dataclasses.dataclass
class Relaxation:
    """The path of one crystal towards its minimum.

    Steps are in strain (six numbers) and atomic moves (3 N, bohr); the matrix is built up by the rule of Broyden,
    Fletcher, Goldfarb and Shanno.

    Attributes:
        lattice: [3, 3] bohr.
        frac_coords: [N, 3].
    """

    lattice: np.ndarray
    frac_coords: np.ndarray

    def __post_init__(self) -> None:
        volume = abs(np.linalg.det(self.lattice))
        stiffness = [volume * _STRAIN_STIFFNESS] * 6 + [_ATOM_STIFFNESS] * self.frac_coords.size
        self._hessian = np.diag(stiffness)
        self._last: tuple[np.ndarray, np.ndarray] | None = None

    def step(self, forces: np.ndarray, stress: np.ndarray) -> None:
        """Move, given forces [N, 3] (Ha/bohr) and stress [3, 3] (Ha/bohr^3) at the present place."""
        volume = abs(np.linalg.det(self.lattice))
        # Shear strains appear twice in the symmetric matrix.
        gradient = np.concatenate([volume * stress[_I, _J] * _TWICE, -forces.ravel()])
        if self._last is not None:
            move, before = self._last
            change, bent = gradient - before, self._hessian @ move
            if change @ move > _CURVATURE_FLOOR * (move @ bent):
                self._hessian += np.outer(change, change) / (change @ move) - np.outer(bent, bent) / (move @ bent)
        move = -np.linalg.solve(self._hessian, gradient)
        move *= min(1.0, _LARGEST_STRAIN / max(abs(move[:6]).max(), 1e-12))
        move *= min(1.0, _LARGEST_MOVE / max(abs(move[6:]).max(initial=0.0), 1e-12))
        self._last = move, gradient
        strain = np.zeros((3, 3))
        strain[_I, _J] = strain[_J, _I] = move[:6]
        self.frac_coords = self.frac_coords + move[6:].reshape(-1, 3) @ np.linalg.inv(self.lattice)
        self.lattice = self.lattice @ (np.eye(3) + strain)


_I, _J = np.array([0, 1, 2, 1, 0, 0]), np.array([0, 1, 2, 2, 2, 1])
_TWICE = np.array([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])


def symmetrise(
    rotations: np.ndarray,
    translations: np.ndarray,
    lattice: np.ndarray,
    frac_coords: np.ndarray,
    forces: np.ndarray,
    stress: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Forces [N, 3] and stress [3, 3] averaged over operations x -> W x + w on fractional coordinates.

    Needed where the k-points are only those that symmetry leaves: the energy of a distorted crystal then is not
    the derivative's.
    """
    new_forces, new_stress = np.zeros_like(forces), np.zeros_like(stress)
    for rotation, translation in zip(rotations, translations, strict=True):
        cartesian = np.linalg.inv(lattice) @ rotation.T @ lattice  # rows: x -> x @ cartesian
        moved = frac_coords @ rotation.T + translation
        offsets = moved[:, None] - frac_coords[None]
        image = np.argmin(np.square((offsets - np.rint(offsets)) @ lattice).sum(axis=-1), axis=1)
        new_forces[image] += forces @ cartesian
        new_stress += cartesian.T @ stress @ cartesian
    return new_forces / len(rotations), new_stress / len(rotations)
