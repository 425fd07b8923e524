"""Refinement of the tile IR by the device IR: the machinery behind the property `refinement`."""
