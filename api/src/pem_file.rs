//! Secrets on disk: PEM blocks in one file that only its owner may read, replaced as a whole or not at all.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Why an identity could not be made, read, written or used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the certificate authority refused: {0}")]
    Sign(#[from] rcgen::Error),
    #[error("it is not a certificate with one common name")]
    BadCertificate,
    #[error("the key does not belong to the certificate")]
    KeyMismatch,
    #[error("cannot {verb} {path}")]
    File { verb: &'static str, path: PathBuf, source: io::Error },
    #[error("{0} does not hold the expected PEM blocks")]
    BadFile(PathBuf),
    #[error("'{0}' is not an endpoint: write host:port or unix:/path")]
    BadEndpoint(String),
    #[error("the TLS settings are not usable: {0}")]
    BadConfig(String),
}

/// A file of this crate holds three blocks of about 1 KB; more than this is not one of ours.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// The PEM blocks of a file, each with its own BEGIN and END line; `None` when there is no such file.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<String>>, TlsError> {
    let failed = |source| TlsError::File { verb: "read", path: path.into(), source };
    match fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
        Ok(found) if found.len() > MAX_FILE_BYTES => return Err(TlsError::BadFile(path.into())),
        Ok(_) => {}
    }
    let text = fs::read_to_string(path).map_err(failed)?;
    blocks(&text).map(Some).ok_or_else(|| TlsError::BadFile(path.into()))
}

/// Replaces the file; its directory is made, for its owner only, when it is missing.
pub(crate) fn write(path: &Path, blocks: &[&str]) -> Result<(), TlsError> {
    let failed = |source| TlsError::File { verb: "write", path: path.into(), source };
    let mut text = String::new();
    for block in blocks {
        text.push_str(block.trim_end());
        text.push('\n');
    }
    replace(path, text.as_bytes()).map_err(failed)
}

/// Writes beside the file, syncs, renames over it and syncs the directory. Mode 0600.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !dir.exists() {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    let beside = path.with_extension("new");
    // One left by a crash may have another mode.
    match fs::remove_file(&beside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    File::open(dir)?.sync_all()
}

fn blocks(text: &str) -> Option<Vec<String>> {
    let mut found = Vec::new();
    let mut open: Option<String> = None;
    for line in text.lines().map(str::trim_end) {
        match (&mut open, line) {
            (None, "") => {}
            (None, line) if line.starts_with("-----BEGIN ") => open = Some(format!("{line}\n")),
            (None, _) => return None,
            (Some(block), line) => {
                block.push_str(line);
                block.push('\n');
                if line.starts_with("-----END ") {
                    found.extend(open.take());
                }
            }
        }
    }
    open.is_none().then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_its_blocks_and_nothing_else() {
        let one = "-----BEGIN A-----\nx\n-----END A-----\n";
        assert_eq!(blocks(&format!("{one}\n{one}")), Some(vec![one.to_owned(), one.to_owned()]));
        assert_eq!(blocks(""), Some(vec![]));
        for bad in ["junk", "-----BEGIN A-----\nx\n", "-----BEGIN A-----\n-----END A-----\njunk"] {
            assert_eq!(blocks(bad), None, "{bad}");
        }
    }
}
