"""The layouts of MNIST-M on disk: what tells them apart, and a small reader for each."""
