"""Adapters, one file a family. Wan and FLUX.1 are beside this package."""
