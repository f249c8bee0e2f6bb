"""The demo's task, model, warm-up and arms: everything `igrpo demo` needs and no hub has."""
