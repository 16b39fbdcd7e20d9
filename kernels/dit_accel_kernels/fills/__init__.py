"""Constants in memory by a kernel of ours, which a recording can start again; see :mod:`dit_accel_kernels.recording`."""
