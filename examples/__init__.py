"""Programs written against the public SDK: a production service on real data, and the demo with the loop around it."""
