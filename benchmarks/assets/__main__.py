"""`python -m benchmarks.assets NAMES`: fetch assets and print where they lie."""

import argparse
import sys

from benchmarks import assets


def main(argv: list[str] | None = None) -> None:
    """Fetch the named assets and print where they lie."""
    parser = argparse.ArgumentParser(description=(assets.__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", choices=sorted(assets.ASSETS))
    for name in parser.parse_args(argv).names:
        try:
            print(f"{name}: {assets.fetch(name)}", flush=True)
        except ValueError as error:
            sys.exit(f"assets: {error}")


if __name__ == "__main__":
    main()
