"""The functions of fastcl.functional, by family."""
