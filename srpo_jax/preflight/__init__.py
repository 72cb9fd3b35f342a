"""What a run will need, known before any accelerator is: its real programs, compiled ahead of time for a TPU slice.

`programs` makes the programs of a configuration from shapes alone, `report` compiles them and reads memory and collectives off
the result, `advice` looks for a change that makes a configuration fit by compiling it. `tpu/preflight.py` is the command.
"""
