"""Makes ``skeletons.json`` from an MP-20 CSV file: ``python -m crystaljax.data.build CSV``.

The rows are the benchmark crystals C1-C7 and the 94 five-site cubic rows of the MP-20 validation set.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from crystaljax import library, structures


def build(path: str) -> dict:
    """The content of ``skeletons.json`` for the rows of the MP-20 CSV file at ``path``."""
    entries = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            skeleton = structures.from_mp20_row(row)
            entries.append(
                {
                    "row": int(row["row"]),
                    "material_id": row["material_id"],
                    "formula": row["pretty_formula"],
                    "space_group": int(float(row["spacegroup.number"])),
                    "species": list(skeleton.species),
                    "lattice": (skeleton.lattice.round(8) + 0.0).tolist(),
                    "frac_coords": (skeleton.frac_coords.round(8) % 1.0).tolist(),
                }
            )
    return {
        "source": "Materials Project (materialsproject.org), rows of the MP-20 validation split of Xie et al. 2022",
        "licence": "CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/",
        "entries": sorted(entries, key=lambda entry: entry["row"]),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", help="MP-20 CSV file with a 'row' column")
    library.DATA_FILE.write_text(json.dumps(build(parser.parse_args().csv)) + "\n")
    print(f"wrote {Path(library.DATA_FILE).name}")
