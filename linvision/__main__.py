"""`python -m linvision`, the `linvision` command: also `torchrun … -m linvision train NAME`."""

from linvision.cli.main import main

if __name__ == '__main__':  # worker processes import this file under another name
    main()
