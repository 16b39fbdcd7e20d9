"""Calibration: what a pipeline's attention needs, found by a few runs.

``observe`` watches dense runs, ``run`` turns what it saw into a profile for a target, ``static`` makes static plans,
``quality`` compares pictures, ``folder`` keeps what is done. :func:`dit_accel.calibrate` is the way in.
"""
