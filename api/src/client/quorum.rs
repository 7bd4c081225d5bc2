//! A backup of the quorum on its way into a file: whole and verified under its name, or not there at all.

use std::{
    fs::{self, File},
    io::{self, BufReader, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::Duration,
};

use super::{Asked, Client};
use crate::{
    error::ApiError,
    proto::BackUpQuorumRequest,
    quorum_backup::{self, Backup},
};

/// A controller copies its state before the first byte; a stream that stands still for so long is broken.
const STALL: Duration = Duration::from_secs(30);

impl Client {
    /// Writes the backup beside `path`, reads it back from the disk, and only then gives it its name. Only its owner may
    /// read the file: the key of the cloud's authority is in it.
    ///
    /// # Errors
    /// When there is such a file already, the disk fails, or no controller gives a whole and sound backup.
    pub async fn back_up_quorum(&self, path: &Path, progress: impl Fn(u64)) -> Result<Backup, ApiError> {
        let exists = || ApiError::new("already-exists", format!("{} exists already", path.display()));
        if path.exists() {
            return Err(exists());
        }
        let beside = path.with_added_extension("part");
        let receive = |index: usize| self.receive_backup(index, &beside, &progress);
        let received = self.restarting(Asked::Read, receive).await;
        let finished = received.and_then(|()| {
            let backup = read_quorum_backup(&beside)?;
            fs::hard_link(&beside, path).map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => exists(),
                _ => failed(path, &error),
            })?;
            Ok(backup)
        });
        let removed = fs::remove_file(&beside).map_err(|error| failed(&beside, &error));
        let backup = finished?;
        removed?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| failed(folder, &error))?;
        Ok(backup)
    }

    async fn receive_backup(&self, endpoint: usize, path: &Path, progress: &impl Fn(u64)) -> Result<(), ApiError> {
        let stalled = |_| ApiError::new("unavailable", "the controller sent nothing for too long");
        let mut request = tonic::Request::new(BackUpQuorumRequest {});
        self.authorize(&mut request, None);
        let mut stub = self.stub(endpoint);
        let mut stream =
            tokio::time::timeout(STALL, stub.back_up_quorum(request)).await.map_err(stalled)??.into_inner();
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(path, &error)),
            _ => {}
        }
        let made = File::options().write(true).create_new(true).mode(0o600).open(path);
        let mut file = made.map_err(|error| failed(path, &error))?;
        let mut received = 0;
        while let Some(chunk) = tokio::time::timeout(STALL, stream.message()).await.map_err(stalled)?? {
            file.write_all(&chunk.data).map_err(|error| failed(path, &error))?;
            received += chunk.data.len() as u64;
            progress(received);
        }
        file.sync_all().map_err(|error| failed(path, &error))
    }
}

/// Reads a backup of a quorum and checks all of it, without any controller.
///
/// # Errors
/// When it cannot be read, or is not whole and sound.
pub fn read_quorum_backup(path: &Path) -> Result<Backup, ApiError> {
    let file = File::open(path).map_err(|error| failed(path, &error))?;
    let read = quorum_backup::read(BufReader::new(file), |_| {});
    read.map_err(|error| ApiError::new("failed", format!("{}: {error}", path.display())))
}

fn failed(path: &Path, error: &io::Error) -> ApiError {
    ApiError::new("failed", format!("{}: {error}", path.display()))
}
