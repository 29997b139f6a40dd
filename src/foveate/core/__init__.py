"""What a method is, what it sees and how a stack of methods is applied; knows torch only."""
