"""What every kernel uses: dispatch, launching, devices, scratch and host memory."""
