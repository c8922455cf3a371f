"""What uses a trained run: `ensemble` makes one network of its networks, `predict` classifies images, `export` writes a
file that needs only PyTorch."""
