"""`igrpo demo` with everything it needs: task, model, warm-up, runs and verdict; no hub."""
