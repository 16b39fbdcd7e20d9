"""dit_accel for Hugging Face diffusers: adapters for its transformers and the code that installs them.

Importing this package imports torch and ``dit_accel``, never diffusers; :func:`dit_accel_patches.install.install` does.
"""
