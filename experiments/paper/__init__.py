"""The paper's figures and tables, one experiment each, by one command."""
