"""What ships: methods, their formulas, and which members go together; the documents are written from it."""
