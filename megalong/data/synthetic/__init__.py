"""Long documents made on the fly: related documents joined, and tasks whose answer is far back in real text."""
