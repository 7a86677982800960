"""Pseudopotential files and their radial tables: against closed forms, and what is refused."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from scipy.special import erf

from crystaljax.dft_bridge.planewave import pseudopotentials
from crystaljax.dft_bridge.planewave.data.build import build
from crystaljax.dft_bridge.planewave.pseudofile import read_pseudopotential
from crystaljax.dft_bridge.planewave.pseudopotentials import (
    Q_MAX_DENSITY,
    Q_MAX_PROJECTOR,
    PseudoError,
    PseudoSet,
    load_folder,
    q_grid,
    read_set,
    shipped,
    tables_from_file,
    write_set,
)
from crystaljax.elements import LARGE

VALENCE = 4
STEEPNESS, HEIGHT, EXPONENT = 1.3, 2.5, 1.7  # v(r) = -Z erf(STEEPNESS r) / r + HEIGHT exp(-EXPONENT r^2), Ha
CORE_CHARGE, CORE_EXPONENT = 1.5, 2.2
ATOM_EXPONENT = 0.6
PROJECTORS = ((0, 1.5), (0, 2.5), (1, 1.8), (2, 2.0))  # (l, a) of beta(r) = r^l exp(-a r^2)
MATRIX = np.diag([1.5, -0.7, 2.5, -3.0])  # Ha
ORBITALS = ((0, 0.8, -0.4), (1, 0.6, -0.15))  # (l, a, Ha) of chi(r) = r^l exp(-a r^2), not normalised


def mesh(r_max=10.6, step=0.02):
    return step * np.arange(round(r_max / step) + 1)


def local_potential(r):
    safe = np.where(r > 0, r, 1.0)
    ratio = np.where(r > 0, erf(STEEPNESS * r) / safe, 2 * STEEPNESS / math.sqrt(math.pi))
    return -VALENCE * ratio + HEIGHT * np.exp(-EXPONENT * r**2)


def core_density(r):
    return CORE_CHARGE * (CORE_EXPONENT / math.pi) ** 1.5 * np.exp(-CORE_EXPONENT * r**2)


def atom_density(r):
    return 4 * math.pi * r**2 * VALENCE * (ATOM_EXPONENT / math.pi) ** 1.5 * np.exp(-ATOM_EXPONENT * r**2)


def section(name, values, **attributes):
    words = "".join(f' {key}="{value}"' for key, value in attributes.items())
    numbers = "\n".join(f"{value:.16E}" for value in np.ravel(values))
    return f'<{name} type="real" size="{np.size(values)}"{words}>\n{numbers}\n</{name}>\n'


def upf(header=(), r=None, matrix=MATRIX, v_local=None, cutoffs=None, core=True, atom=True, orbitals=None):
    """The text of a UPF file of the analytic pseudopotential above; ``header`` overrides attributes."""
    r = mesh() if r is None else r
    v_local = local_potential(r) if v_local is None else v_local
    cutoffs = [400] * len(PROJECTORS) if cutoffs is None else cutoffs
    attributes = {
        "element": "Si",
        "pseudo_type": "NC",
        "relativistic": "scalar",
        "is_ultrasoft": "F",
        "is_paw": "F",
        "has_so": ".false.",
        "core_correction": "T" if core else "F",
        "functional": "SLA  PW   PBX  PBC",
        "z_valence": f"   {VALENCE}.00",
        "mesh_size": f" {len(r)}",
        "number_of_proj": len(PROJECTORS),
    } | dict(header)
    words = "\n".join(f'{key}="{value}"' for key, value in attributes.items())
    betas = [
        section(
            f"PP_BETA.{i + 1}",
            r ** (ell + 1) * np.exp(-a * r**2),
            angular_momentum=ell,
            cutoff_radius_index=f" {cutoffs[i]}",
        )
        for i, (ell, a) in enumerate(PROJECTORS)
    ]
    orbitals = "".join(
        section(f"PP_CHI.{i}", r ** (ell + 1) * np.exp(-a * r**2), l=ell, occupation=2, pseudo_energy=2 * energy)
        for i, (ell, a, energy) in enumerate(ORBITALS if orbitals is None else orbitals, 1)
    )
    return (
        '<UPF version="2.0.1">\n<PP_INFO>\nMade by A & B <someone@somewhere> -- for tests\n</PP_INFO>\n'
        "<!-- a comment -- with hyphens -->\n"
        f"<PP_HEADER {words}/>\n"
        f"<PP_MESH>\n{section('PP_R', r)}{section('PP_RAB', np.gradient(r))}</PP_MESH>\n"
        + (section("PP_NLCC", core_density(r)) if core else "")
        + section("PP_LOCAL", 2 * v_local)
        + f"<PP_NONLOCAL>\n{''.join(betas)}{section('PP_DIJ', 2 * matrix)}</PP_NONLOCAL>\n"
        + (f"<PP_PSWFC>\n{orbitals}</PP_PSWFC>\n" if orbitals else "")
        + (section("PP_RHOATOM", atom_density(r)) if atom else "")
        + "</UPF>\n"
    )


def psp8(extension=1, functional=11, r=None):
    """The text of a psp8 file of the same pseudopotential."""
    r = mesh() if r is None else r
    counts = [sum(1 for ell, _ in PROJECTORS if ell == momentum) for momentum in range(3)]

    def rows(*columns):
        table = zip(*columns, strict=True)
        return [f"{i:6d}" + "".join(f"{x:24.16E}".replace("E", "D") for x in row) for i, row in enumerate(table, 1)]

    lines = [
        "Si    synthetic",
        f"    14.0000      {VALENCE}.0000      240101    zatom,zion,pspd",
        f"     8   {functional}   2     4   {len(r)}     0    pspcod,pspxc,lmax,lloc,mmax,r2well",
        "  9.99000000  4.00000000  0.00000000    rchrg fchrg qchrg",
        f"     {'     '.join(map(str, counts))}     0     0    nproj",
        f"     {extension}     1           extension_switch",
    ]
    for momentum in range(3):
        energies = [MATRIX[i, i] for i, (ell, _) in enumerate(PROJECTORS) if ell == momentum]
        lines.append(f"{momentum}   " + " ".join(f"{e:.16E}" for e in energies))
        lines += rows(r, *(r ** (ell + 1) * np.exp(-a * r**2) for ell, a in PROJECTORS if ell == momentum))
    lines += ["4", *rows(r, local_potential(r))]
    zeros = np.zeros_like(r)
    lines += rows(r, 4 * math.pi * core_density(r), zeros, zeros, zeros, zeros)
    if extension == 1:
        safe = np.where(r > 0, r, 1.0)
        value = np.where(r > 0, atom_density(r) / safe**2, 4 * math.pi * VALENCE * (ATOM_EXPONENT / math.pi) ** 1.5)
        lines += rows(r, value, zeros, zeros)
    return "\n".join(lines) + "\n<INPUT>\n# not read\n</INPUT>\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="Si.upf"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def assert_closed_forms(tables):
    q, k = q_grid(Q_MAX_DENSITY), q_grid(Q_MAX_PROJECTOR)
    safe = np.where(q > 0, q, 1.0)
    long_range = 4 * math.pi * VALENCE / safe**2 * (np.exp(-(q**2) / 4) - np.exp(-(q**2) / (4 * STEEPNESS**2)))
    long_range[0] = math.pi * VALENCE * (1 / STEEPNESS**2 - 1)
    gaussian = HEIGHT * (math.pi / EXPONENT) ** 1.5 * np.exp(-(q**2) / (4 * EXPONENT))
    np.testing.assert_allclose(tables.local, long_range + gaussian, atol=1e-8)
    np.testing.assert_allclose(tables.core, CORE_CHARGE * np.exp(-(q**2) / (4 * CORE_EXPONENT)), atol=1e-8)
    np.testing.assert_allclose(tables.density, VALENCE * np.exp(-(q**2) / (4 * ATOM_EXPONENT)), atol=1e-8)
    assert tables.angular_momenta.tolist() == [ell for ell, _ in PROJECTORS]
    np.testing.assert_allclose(tables.energies, np.diag(MATRIX), rtol=1e-14)
    for row, (ell, a) in zip(tables.projectors, PROJECTORS, strict=True):
        expected = math.sqrt(math.pi) * k**ell / (2 ** (ell + 2) * a ** (ell + 1.5)) * np.exp(-(k**2) / (4 * a))
        np.testing.assert_allclose(row, expected, atol=1e-8)


@pytest.mark.parametrize(("text", "name"), [(upf(), "Si.upf"), (psp8(), "Si.psp8")])
def test_tables_are_the_closed_forms(write, text, name):
    path = write(text, name)
    tables = tables_from_file(path)
    assert (tables.symbol, tables.valence, tables.functional) == ("Si", VALENCE, "PBE")
    assert tables.source == {"file": name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "set": ""}
    assert_closed_forms(tables)


def test_a_file_is_read_as_it_stands(write):
    file = read_pseudopotential(write(upf(core=False, atom=False)))
    np.testing.assert_array_equal(file.r, mesh())
    np.testing.assert_allclose(file.v_local, local_potential(mesh()), rtol=1e-14)
    np.testing.assert_allclose(file.dij, MATRIX, rtol=1e-14)
    assert file.rho_core is None and file.rho_atom is None
    assert [(p.angular_momentum, p.cutoff, p.values.shape) for p in file.projectors][-1] == (2, 400, mesh().shape)


def test_atomic_orbitals(write):
    """Closed forms: int r^(l + 2) exp(-a r^2) j_l(qr) dr is a Gaussian times q^l."""
    tables, q = tables_from_file(write(upf())), q_grid(Q_MAX_PROJECTOR)
    np.testing.assert_array_equal(tables.orbital_momenta, [0, 1])
    np.testing.assert_allclose(tables.orbital_energies, [-0.4, -0.15])
    for row, (ell, a, _) in zip(tables.orbitals, ORBITALS, strict=True):
        shape = q**ell * np.exp(-(q**2) / (4 * a))
        norm = math.sqrt(math.pi / 2 / np.trapezoid(q**2 * shape**2, q))
        np.testing.assert_allclose(row, norm * shape, atol=2e-3 * norm)


def test_files_without_atomic_orbitals_are_read_too(write):
    for text in (upf(orbitals=()), psp8()):
        tables = tables_from_file(write(text))
        assert len(tables.orbital_momenta) == len(tables.orbital_energies) == 0
        assert tables.orbitals.shape == (0, len(q_grid(Q_MAX_PROJECTOR)))
    # An atom does not bind an orbital of negative occupation, and a file may not know an energy.
    free = upf().replace('occupation="2"', 'occupation="-1.0"', 1).replace(' pseudo_energy="-0.3"', "")
    tables = tables_from_file(write(free))
    assert tables.orbital_momenta.tolist() == [1] and tables.orbital_energies.tolist() == [-0.5]


def test_without_core_and_atomic_density(write):
    tables = tables_from_file(write(upf(core=False, atom=False)))
    assert not tables.core.any()
    assert tables.density[0] == VALENCE and tables.density[50] == pytest.approx(VALENCE * math.exp(-0.5))


def test_integrals_end_just_beyond_ten_bohr(write):
    """Up to the first point beyond 10 bohr, one less for an odd number: what pw.x integrates."""
    r = mesh()
    used = r <= 10.0 + 1e-9  # 501 points; 10.02 is the first beyond, the 502nd
    noisy = np.where(used, local_potential(r), local_potential(r) * 1.001)
    clean, noise = (tables_from_file(write(upf(v_local=v))) for v in (local_potential(r), noisy))
    np.testing.assert_array_equal(clean.local, noise.local)
    noisy[500] *= 1.001
    assert np.max(np.abs(tables_from_file(write(upf(v_local=noisy))).local - clean.local)) > 1e-5


def test_projectors_end_at_the_largest_cutoff(write):
    """All end where the longest does, one point earlier for an odd number."""
    tables = [tables_from_file(write(upf(cutoffs=c))) for c in ([60, 30, 50, 60], [59] * 4, [58] * 4)]
    np.testing.assert_array_equal(tables[0].projectors, tables[1].projectors)
    assert np.max(np.abs(tables[1].projectors - tables[2].projectors)) > 0


def test_rotation_to_a_diagonal_matrix_keeps_the_potential(write):
    matrix = MATRIX.copy()
    matrix[0, 1] = matrix[1, 0] = 0.9
    plain, rotated = tables_from_file(write(upf())), tables_from_file(write(upf(matrix=matrix)))
    before = np.einsum("iq,ij,jk->qk", plain.projectors[:2, ::20], matrix[:2, :2], plain.projectors[:2, ::20])
    after = np.einsum("iq,i,ik->qk", rotated.projectors[:2, ::20], rotated.energies[:2], rotated.projectors[:2, ::20])
    np.testing.assert_allclose(after, before, atol=1e-13)
    assert np.max(np.abs(rotated.projectors[:2] - plain.projectors[:2])) > 1e-3
    np.testing.assert_array_equal(rotated.projectors[2:], plain.projectors[2:])
    np.testing.assert_array_equal(rotated.energies[2:], plain.energies[2:])


COUPLED = MATRIX + 0.1 * np.eye(4)[[2, 1, 0, 3]]
REFUSED = {
    "ultrasoft": (upf({"pseudo_type": "US", "is_ultrasoft": "T"}), "ultrasoft"),
    "PAW": (upf({"is_paw": ".true."}), "PAW"),
    "semilocal": (upf({"pseudo_type": "SL"}), "semilocal"),
    "spin-orbit": (upf({"has_so": "T"}), "spin-orbit"),
    "fully relativistic": (upf({"relativistic": "full"}), "spin-orbit"),
    "Coulomb": (upf({"is_coulomb": "T"}), "Coulomb"),
    "fractional valence": (upf({"z_valence": "3.5"}), "3.5 electrons"),
    "wrong valence": (upf({"z_valence": "7"}), "-7/r"),
    "no such element": (upf({"element": "Zz"}), "'Zz'"),
    "no mesh": (upf({"mesh_size": "0"}), "0 points"),
    "other mesh": (upf({"mesh_size": "600"}), "531 numbers"),
    "orbital with l = 4": (upf().replace(' l="1"', ' l="4"'), "orbital 2 has angular momentum 4"),
    "longer orbital than mesh": (
        upf().replace("</PP_CHI.1>", "1.0\n</PP_CHI.1>").replace('size="531" l=', "l="),
        "532",
    ),
    "too many projectors": (upf({"number_of_proj": "5"}), "PP_BETA.5"),
    "l = 4": (upf().replace('angular_momentum="2"', 'angular_momentum="4"'), "angular momentum 4"),
    "cutoff beyond the mesh": (upf(cutoffs=[400, 400, 400, 900]), "point 900"),
    "coupled angular momenta": (upf(matrix=COUPLED), "different angular momenta"),
    "asymmetric matrix": (upf(matrix=MATRIX + np.eye(4, k=1) * [0, 1, 0, 0]), "not symmetric"),
    "cut short": (upf()[:60_000], "truncated"),
    "a hole": (upf()[:20_000] + upf()[30_000:], "truncated|instead of|garbled|not well-formed"),
    "NaN": (upf(v_local=np.where(mesh() == 1.0, np.nan, local_potential(mesh()))), "not finite"),
    "no number": (upf().replace("E+00", "X+00", 30), "garbled"),
    "falling mesh": (upf(r=mesh()[::-1]), "does not increase"),
    "UPF 1": ("<PP_INFO>\n</PP_INFO>\n<PP_HEADER>\n   0  Version Number\n</PP_HEADER>\n", "not version 2"),
    "something else": ("Si\n1\n2 3\n", "neither UPF version 2 nor psp8"),
    "empty": ("", "neither"),
    "psp8 with spin-orbit": (psp8(extension=3), "spin-orbit"),
    "psp8 cut short": ("\n".join(psp8().splitlines()[:1000]), "truncated"),
    "psp8 without the density": (psp8()[: psp8().rindex("<INPUT>") - 90], "garbled"),
    "psp8 garbled": (psp8().replace("D-02", "Q-02"), "garbled"),
    "psp8 out of step": (psp8().replace("\n   531", "\n   532", 1), "garbled rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_file_reason_and_advice(write, case):
    text, reason = REFUSED[case]
    path = write(text, "odd.upf")
    with pytest.raises(PseudoError, match=reason) as caught:
        tables_from_file(path)
    assert "odd.upf" in str(caught.value) and "PseudoDojo" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(PseudoError, match="none.upf: cannot be read"):
        read_pseudopotential(tmp_path / "none.upf")


def test_a_folder_is_a_set(write, tmp_path):
    write(upf(), "first.UPF")
    write(upf({"element": "C "}), "second.upf")
    write("no pseudopotential", "notes.txt")
    found = load_folder(tmp_path)
    assert found.symbols == ("C", "Si") and len(found) == 2 and found.functional == "PBE"
    assert "C" in found and "Ge" not in found and found.valence("C") == VALENCE
    assert found["C"].source["file"] == "second.upf" and found["C"].source["set"] == tmp_path.name == found.name
    with pytest.raises(PseudoError, match="no pseudopotential for Ge; it has C Si"):
        found["Ge"]
    assert PseudoSet("other name", found.tables).digest == found.digest
    assert PseudoSet("part", {"C": found["C"]}).digest != found.digest


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.upf": upf(), "b.psp8": psp8()}, "a.upf and b.psp8 are both for Si"),
        ({"a.upf": upf(), "b.upf": upf({"element": "C", "functional": "PBESOL"})}, "different functionals.*b.upf"),
        ({"readme.txt": ""}, "holds no .upf"),
    ],
)
def test_folders_that_are_no_set(write, tmp_path, files, reason):
    for name, text in files.items():
        write(text, name)
    with pytest.raises(PseudoError, match=reason):
        load_folder(tmp_path)
    with pytest.raises(PseudoError, match="no such folder"):
        load_folder(tmp_path / "elsewhere")


def test_build_gives_the_same_bytes_and_tables(write, tmp_path):
    write(upf(), "Si.upf")
    write(upf({"element": "Nb"}, core=False), "Nb.upf")
    write(upf({"element": "C"}), "C.upf")
    outputs = [tmp_path / "one.npz", tmp_path / "two.npz"]
    made = [build(tmp_path, output, symbols=("Si",)) for output in outputs]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert made[0].symbols == ("Nb", "Si")
    for symbol in made[0]:
        fresh, read = tables_from_file(tmp_path / f"{symbol}.upf"), made[0][symbol]
        for field in (
            *("local", "core", "density", "angular_momenta", "energies", "projectors"),
            *("orbital_momenta", "orbital_energies", "orbitals"),
        ):
            np.testing.assert_array_equal(getattr(read, field), getattr(fresh, field))
        assert (read.valence, read.functional) == (fresh.valence, fresh.functional)
        assert read.source == fresh.source | {"set": made[0].name}
    with pytest.raises(PseudoError, match="Ge"):
        build(tmp_path, outputs[0], symbols=("Ge",))


def test_a_damaged_set_is_refused(write, tmp_path):
    write(upf())
    write_set(load_folder(tmp_path), tmp_path / "set.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "set.npz").read_bytes()[:5000])
    for name in ("cut.npz", "none.npz"):
        with pytest.raises(PseudoError, match=name):
            read_set(tmp_path / name)


def test_a_set_of_another_grid_is_refused(write, tmp_path, monkeypatch):
    write(upf())
    write_set(load_folder(tmp_path), tmp_path / "set.npz")
    monkeypatch.setattr(pseudopotentials, "Q_STEP", 0.01)
    with pytest.raises(PseudoError, match="another version"):
        read_set(tmp_path / "set.npz")


def test_shipped_set():
    found = shipped()
    assert found is shipped() and found.functional == "PBE"
    assert set(found.symbols) == {*LARGE.symbols, "Nb"}
    valence = {
        "H": 1,
        "Li": 3,
        "O": 6,
        "F": 7,
        "Na": 9,
        "Mg": 10,
        "Si": 4,
        "Cl": 7,
        "K": 9,
        "Cu": 19,
        "Au": 19,
        "Nb": 13,
    }
    assert {symbol: found.valence(symbol) for symbol in valence} == valence
    assert found.digest == "d572929b39caf38242cbff3c5a409f54c6bae916b18b259433e1e66a618de184"
    for symbol in found:
        table = found[symbol]
        assert table.local.shape == table.core.shape == table.density.shape == q_grid(Q_MAX_DENSITY).shape
        assert table.projectors.shape == (len(table.energies), len(q_grid(Q_MAX_PROJECTOR)))
        assert table.density[0] == pytest.approx(table.valence, abs=1e-12)
        assert table.source["file"] == f"{symbol}.upf" and table.source["set"] == found.name
        assert np.all(np.diff(table.angular_momenta) >= 0) and table.angular_momenta.max() <= 3
        assert np.all(table.energies != 0) and np.all(np.abs(table.projectors[table.angular_momenta > 0, 0]) < 1e-12)
        # Even functions of q: a fit through the next points must meet the first.
        for row in (table.local, table.core, table.density):
            q2 = q_grid(Q_MAX_DENSITY)[1:6] ** 2
            assert np.polyval(np.polyfit(q2, row[1:6], 3), 0.0) == pytest.approx(row[0], abs=1e-6)
        holds = 2 * np.sum(2 * table.orbital_momenta + 1)
        assert table.valence <= holds <= 20 and np.all(table.orbital_energies < 0)
        # int q^2 chi(q)^2 dq = pi / 2, as far as half precision and the tail beyond 10 bohr allow
        q = q_grid(Q_MAX_PROJECTOR)
        np.testing.assert_allclose(np.trapezoid(q**2 * table.orbitals.astype(float) ** 2, q), math.pi / 2, rtol=2e-3)
