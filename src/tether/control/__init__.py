"""The world of simulators: policy networks, environments stepped together, and the collection of their steps."""
