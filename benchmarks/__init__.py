"""What README's speed table is made from: `make bench`."""
