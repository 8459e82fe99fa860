"""Long documents made on the fly: related documents joined, and tasks whose answer lies far back in real text."""
