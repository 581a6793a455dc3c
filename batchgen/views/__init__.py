"""What people look at: status, snapshots, differences."""
