"""Which optional package comes with which extra."""

EXTRAS = {
    "train": (
        "transformers",
        "trl",
        "accelerate",
        "datasets",
        "pyarrow",
        "math_verify",
        "typer",
        "rich",
        "matplotlib",
        "scipy",
        "safetensors",
        "yaml",
        "httpx2",
    ),
    "vllm": ("vllm",),
}


def pip_line(module: str | None) -> str | None:
    """Return what installs a module that igrpo uses on request, or None for any other.

    Examples:
        >>> pip_line("trl.trainer"), pip_line("peft"), pip_line("my_module")
        ("pip install 'igrpo[train]'", 'pip install peft', None)
    """
    package = (module or "").partition(".")[0]
    if package == "peft":
        return "pip install peft"
    for extra, packages in EXTRAS.items():
        if package in packages:
            return f"pip install 'igrpo[{extra}]'"
    return None
