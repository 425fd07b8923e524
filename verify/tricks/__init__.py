"""Expressions that compute floats on their bits: found in the IR, evaluated, and matched to conversions."""
