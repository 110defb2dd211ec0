"""Methods for federations whose devices differ in what they can compute."""
