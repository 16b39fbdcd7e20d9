"""``python -m dit_accel`` is the command line."""

from dit_accel.cli import main

main()
