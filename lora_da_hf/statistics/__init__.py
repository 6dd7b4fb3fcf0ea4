"""One pass over the samples: taps on the layers, sums in full precision, a model left as it was found."""
