"""The whole way of a row, from job file to snapshot."""
