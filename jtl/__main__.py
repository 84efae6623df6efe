"""`python -m jtl --config=FILE --config.section.field=value`: flags, config, recipe. No logic."""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_USAGE = """Run one config of jtl.

  python -m jtl --config=configs/quickstart.py
  python -m jtl --config=configs/quickstart.py --config.plan.per_phase=1 --config.seed=3
"""


def main(_: list[str]) -> None:
    """Run the config and end with its errors in one line."""
    from jtl import config

    try:
        given = flags.FLAGS.config.to_dict()  # a file that failed to load says so here
    except (AttributeError, OSError) as error:
        sys.exit(f"jtl: {' '.join(str(error).split())}; give --config=configs/NAME.py")
    logging.set_verbosity(logging.WARNING)  # Orbax writes a page for every save
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("JTL_KEEP_MEMORY", "1")  # the process is this run's alone
    try:
        config.run(given)
    except (ValueError, OSError) as error:
        sys.exit(f"jtl: {error}")
    except KeyboardInterrupt:
        sys.exit("jtl: stopped; the same command goes on from the last save")


def cli() -> None:
    """Parse flags; a section that does not exist and a missing file are errors in one line."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Path of a config file; --config.FIELD=VALUE changes or adds a field.",
        lock_config=False,  # a field that the file leaves out may be given: `config.run` knows all
        accept_new_attributes=True,
    )
    flags.mark_flag_as_required("config")
    sys.modules["__main__"].__doc__ = _USAGE  # absl shows this for --help
    app.run(main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        from jtl.config import TABLES

        said = " ".join(str(error.args[0] if error.args else error).split())
        sys.exit(f"jtl: the config has no section {said}; sections are {sorted(TABLES)}")
    except (OSError, ImportError) as error:
        sys.exit(f"jtl: the config file cannot be read: {error}; give --config=configs/NAME.py")


if __name__ == "__main__":
    cli()
