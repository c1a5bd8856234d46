"""Starts the command line; says in one line what to install where the training extras are missing."""

import sys


def main() -> None:
    try:
        from alignkit.cli import run
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("alignkit", "alignkit_kernels"):
            raise
        print(
            f"alignkit: the command line needs {error.name}, which is not installed: pip install 'alignkit[train]'",
            file=sys.stderr,
        )
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
