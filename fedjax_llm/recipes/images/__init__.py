"""Methods on dual encoders: images that are classified by names of classes."""
