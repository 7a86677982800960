"""Stand-ins for ``pw.x`` and for pseudopotentials: what they write, without physics."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

VALENCE = {"Li": 3, "Na": 9, "Mg": 10, "Al": 3, "Si": 4, "O": 6, "F": 7, "Cl": 7}

TEXT = """
     Program PWSCF v.7.2 starts on  1Jan2026 at  0: 0: 0
     number of electrons       =         8.00
!    total energy              =     -15.80000000 Ry
     convergence has been achieved in   6 iterations
=------------------------------------------------------------------------------=
   JOB DONE.
=------------------------------------------------------------------------------=
"""

XML = """<?xml version="1.0" encoding="UTF-8"?>
<qes:espresso xmlns:qes="http://www.quantum-espresso.org/ns/qes/qes-1.0">
 <output>
  <convergence_info><scf_conv><n_scf_steps>6</n_scf_steps></scf_conv></convergence_info>
  <atomic_structure nat="2" alat="7.2">
   <atomic_positions>
    <atom name="Si" index="1">0.0 0.0 0.0</atom>
    <atom name="Si" index="2">2.57 2.57 2.57</atom>
   </atomic_positions>
   <cell><a1>0.0 5.14 5.14</a1><a2>5.14 0.0 5.14</a2><a3>5.14 5.14 0.0</a3></cell>
  </atomic_structure>
  <total_energy><etot>-7.9</etot></total_energy>
  <band_structure>
   <nelec>8.0</nelec>
   <ks_energies>
    <eigenvalues size="6">-0.2 0.20 0.20 0.20 0.30 0.30</eigenvalues>
    <occupations size="6">1.0 1.0 1.0 1.0 0.0 0.0</occupations>
   </ks_energies>
   <ks_energies>
    <eigenvalues size="6">-0.1 0.10 0.15 0.15 0.25 0.30</eigenvalues>
    <occupations size="6">1.0 1.0 1.0 1.0 0.0 0.0</occupations>
   </ks_energies>
  </band_structure>
 </output>
</qes:espresso>
"""
"""Silicon, 8 electrons, two k-points: valence band up to 0.20 Ha, conduction band from 0.25 Ha."""


def error(routine: str, message: str) -> str:
    """The words with which ``pw.x`` stops."""
    line = " " + "%" * 78
    return f"{line}\n     Error in routine {routine} (1):\n     {message}\n{line}\n\n     stopping ...\n"


NOT_CONVERGED = "     convergence NOT achieved after  60 iterations: stopping\n   JOB DONE.\n"


def program(path: Path, body: str) -> str:
    """The command of an executable that says its version and, given an input file, runs the lines of ``body``.

    They find ``text`` and ``xml``, and ``source``, the input file's content. For a calculation of bands ``xml`` has the
    levels of its first k-point at each of those that the input lists.
    """
    lines = [
        f"#!{sys.executable}",
        "import os, pathlib, re, signal, sys, time",
        f"text, xml = {TEXT!r}, {XML!r}",
        "if len(sys.argv) < 3: sys.exit(print(text))",
        "source = pathlib.Path(sys.argv[2]).read_text()",
        "listed = source.partition('K_POINTS crystal\\n')[2].split('\\n')[0]",
        "first, *others = re.findall(r'<ks_energies>.*?</ks_energies>', xml, re.DOTALL)",
        "for other in others if listed else []: xml = xml.replace(other, '')",
        "if listed: xml = xml.replace(first, first * int(listed))",
        body,
    ]
    path.write_text("\n".join(lines))
    path.chmod(0o755)
    return str(path)


SUCCEED = "pathlib.Path('x.xml').write_text(xml); print(text)"


def upf(folder: Path, symbol: str, name: str = "", **header: str) -> Path:
    """A file that has the header of a norm-conserving PBE pseudopotential, entries replaced by keyword."""
    entries = {
        "element": symbol,
        "pseudo_type": "NC",
        "functional": "PBE",
        "z_valence": f"{VALENCE.get(symbol, 4):.1f}",
        "has_so": "F",
        "is_coulomb": "F",
    } | header
    attributes = "\n".join(f'{key}="{value}"' for key, value in entries.items())
    path = folder / (name or f"{symbol}.upf")
    path.write_text(f'<UPF version="2.0.1">\n<PP_HEADER\ncomment="a > b"\n{attributes}/>\n{np.pi}\n</UPF>\n')
    return path
