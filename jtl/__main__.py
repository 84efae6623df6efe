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

    logging.set_verbosity(logging.WARNING)  # Orbax writes a page for every save
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        config.run(flags.FLAGS.config)
    except ValueError as error:
        sys.exit(f"jtl: {error}")
    except KeyboardInterrupt:
        sys.exit("jtl: stopped; the same command goes on from the last save")


def cli() -> None:
    """Parse flags; a config field that does not exist and a missing file are errors in one line."""
    config_flags.DEFINE_config_file("config", None, "Path of a config file.", lock_config=True)
    flags.mark_flag_as_required("config")
    sys.argv[0] = _USAGE
    try:
        app.run(main, flags_parser=_parse)
    except (AttributeError, KeyError, OSError) as error:
        sys.exit(f"jtl: {error}")


def _parse(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        sys.exit(f"jtl: the config has no field {error}; see the fields in the config file")
    except (OSError, ImportError) as error:
        sys.exit(f"jtl: the config file cannot be read: {error}; give --config=configs/NAME.py")


if __name__ == "__main__":
    cli()
