//! Files and directories that survive a power cut: write, sync, rename, sync the directory.

use std::{
    fs::{self, DirBuilder, File},
    io::Write,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use crate::failure::StorageError;

/// Makes the entries of a directory durable: what was created, renamed or removed in it.
pub fn sync_directory(path: &Path) -> Result<(), StorageError> {
    File::open(path).and_then(|d| d.sync_all()).map_err(StorageError::file(path))
}

/// Creates a directory if need be, durably, and for its owner alone: what tenants told the cloud is in it.
pub fn create_directory(path: &Path) -> Result<(), StorageError> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(StorageError::file(path))?;
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_directory(parent),
        _ => Ok(()),
    }
}

/// Replaces a file as a whole: a reader sees the old bytes or the new ones, also after a power cut.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<(), StorageError> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(StorageError::file(path))?;
    sync_directory(path.parent().unwrap_or(Path::new(".")))
}

/// Removes a directory with what is in it; that it does not exist is fine.
pub fn remove_directory(path: &Path) -> Result<(), StorageError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(StorageError::file(path)(error)),
        _ => Ok(()),
    }
}

/// Name and path of everything in a directory.
pub fn entries(path: &Path) -> Result<Vec<(String, PathBuf)>, StorageError> {
    let list = || -> std::io::Result<Vec<(String, PathBuf)>> {
        fs::read_dir(path)?
            .map(|entry| entry.map(|e| (e.file_name().to_string_lossy().into_owned(), e.path())))
            .collect()
    };
    list().map_err(StorageError::file(path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_directory_is_for_its_owner_alone() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("outer/inner");
        create_directory(&path).unwrap();
        create_directory(&path).unwrap();
        for made in [root.path().join("outer"), path] {
            assert_eq!(fs::metadata(made).unwrap().permissions().mode() & 0o777, 0o700);
        }
    }
}
