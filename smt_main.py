"""The `smt` command. It stands beside the package, whose import takes seconds, so that `smt --help` answers at once."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main() -> int:
    """Run `smt_peft.cli`, loaded without its package; the verbs import that when they need it."""
    (package,) = importlib.util.find_spec("smt_peft").submodule_search_locations
    spec = importlib.util.spec_from_file_location("smt_peft.cli", Path(package) / "cli.py")
    cli = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cli)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
