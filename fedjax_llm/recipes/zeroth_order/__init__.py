"""Methods without backpropagation: zeroth order and forward gradients."""
