"""The program `linvision`. The wheel has it as the module `linvision_command`, beside the package.

The package's import brings torch and timm: seconds that `--help` need not take.
In this program's own process the package registers its models where a command needs them (`linvision/cli/main.py`), and
not when it is imported.
"""

registers_later = False


def main() -> None:
    """Run the command."""
    global registers_later
    registers_later = True
    try:
        from linvision.cli.main import main as command
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    command()
