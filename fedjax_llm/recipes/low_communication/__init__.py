"""Methods that synchronise rarely or piece by piece: DiLoCo and its kin."""
