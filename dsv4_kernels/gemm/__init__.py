"""Matrix products over scaled low-precision operands."""
