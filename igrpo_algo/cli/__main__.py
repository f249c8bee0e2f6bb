"""Run the `igrpo` command by `python -m igrpo_algo.cli`."""

from . import main

if __name__ == "__main__":
    main()
