"""The subcommands of ``fastcnn``. Each module has ``add_to(subparsers)`` and ``run(options) -> exit code``."""
