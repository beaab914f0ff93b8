"""The contracts, one file per operator: docstring, reference, registry entry, autograd, public function."""
