"""`python -m igrpo_algo.cli` is the `igrpo` command."""

from . import main

if __name__ == "__main__":
    main()
