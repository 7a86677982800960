"""``python -m benchmarks`` lists the benchmarks; ``python -m benchmarks NAME [options]`` runs one."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """What can be run: the name of each, and the first line of what it says of itself. Nothing is imported for it."""
    found = {}
    for path in sorted(FOLDER.glob("[!_]*.py")):
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' in text:
            found[path.stem.replace("_", "-")] = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
    return found


def main() -> int:
    """Runs the benchmark that the command line names; its own exit code is that of the process."""
    names, given = benchmarks(), sys.argv[1:]
    if not given or given[0] in ("-h", "--help"):
        width = max(map(len, names))
        print("python -m benchmarks NAME [options]; NAME --help says which.\n")
        print("\n".join(f"{name:{width}}  {line}" for name, line in names.items()))
        return 0
    name, *options = given
    if name not in names:
        print(f"no benchmark is called {name!r}; there are: {', '.join(names)}", file=sys.stderr)
        return 2
    sys.argv = [f"python -m benchmarks {name}", *options]
    runpy.run_module(f"benchmarks.{name.replace('-', '_')}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
