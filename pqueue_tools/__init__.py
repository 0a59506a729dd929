"""What the programs of pqueue share."""
