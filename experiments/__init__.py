"""The paper's figures and tables and our studies: lists of commands, and what they came to."""
