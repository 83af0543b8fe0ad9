//! Questions to the file system.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Bytes that are free for this process on the file system that holds `path`, as for the reserve that keeps a node
/// from filling its disk.
///
/// # Errors
/// Whatever the operating system says, for example that `path` does not exist.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Bytes that the files right below `dir` occupy on disk. Files that vanish meanwhile, or cannot be read, count as 0.
pub(crate) fn tree_bytes(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    // The unit of `blocks` is 512 bytes, whatever the block size of the file system.
    entries
        .filter_map(|entry| Some(entry.ok()?.metadata().ok()?.blocks() * 512))
        .sum()
}

/// Makes durable what was created, renamed or removed in `dir`.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    std::fs::File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    #[test]
    fn tells_free_space() {
        let dir = tempfile::tempdir().unwrap();
        assert!(super::free_bytes(dir.path()).unwrap() > 0);
        assert!(super::free_bytes(&dir.path().join("missing")).is_err());
        std::fs::write(dir.path().join("file"), vec![1; 10_000]).unwrap();
        assert!(super::tree_bytes(dir.path()) >= 10_000);
    }
}
