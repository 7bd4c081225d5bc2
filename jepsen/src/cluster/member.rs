//! Changing who the controllers are, and what stands between them and the machine, while clients work.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use api::{client::new_request_id, proto::ControllerRef};

use super::{Cluster, PATIENCE, Stub, shim::Shim};

/// Handing over takes one election; without a quorum it is no use to ask for longer.
const TRANSFER: Duration = Duration::from_secs(5);

impl Cluster {
    /// Starts every controller anew, one after the other, with a [`Shim`]; a later restart has it too.
    ///
    /// # Errors
    /// When it cannot be made, or a controller does not come back.
    pub async fn preload(&mut self) -> anyhow::Result<()> {
        let library = Shim::compile(&self.root)?;
        for controller in 0..self.size() {
            anyhow::ensure!(self.terminate(controller)?, "SIGTERM did not end {}", self.name(controller));
            let member = &mut self.controllers[controller];
            member.shim = Some(Shim::new(&library, &self.root, &member.name, &member.data)?);
            self.restart(controller)?;
            self.settled(PATIENCE).await?;
        }
        Ok(())
    }

    /// What stands between a controller and the machine, after [`Self::preload`].
    pub fn shim(&self, controller: usize) -> Option<&Shim> {
        self.controllers[controller].shim.as_ref()
    }

    /// True while its process has not been taken away by the harness.
    pub fn should_run(&self, controller: usize) -> bool {
        self.controllers[controller].process.is_some()
    }

    /// What is started from now on is the other binary, if there is one; which that is.
    pub fn exchange_binary(&mut self) -> Option<PathBuf> {
        let other = self.other_binary.take()?;
        self.other_binary = Some(std::mem::replace(&mut self.binary, other.clone()));
        Some(other)
    }

    /// Has another controller lead.
    ///
    /// # Errors
    /// When the cloud refuses.
    pub async fn transfer_leader(&self, controller: usize) -> anyhow::Result<()> {
        let to = ControllerRef { id: self.controllers[controller].id };
        let call = |mut stub: Stub, request| async move { stub.transfer_leader(request).await };
        self.client()?.with_deadline(TRANSFER).mutate(new_request_id(), to, call).await?;
        Ok(())
    }

    /// Removes it from the quorum for ever; its process may still run.
    ///
    /// # Errors
    /// When the cloud refuses.
    pub async fn remove_controller(&self, controller: usize) -> anyhow::Result<()> {
        let lost = ControllerRef { id: self.controllers[controller].id };
        let call = |mut stub: Stub, request| async move { stub.remove_controller(request).await };
        self.client()?.mutate(new_request_id(), lost, call).await?;
        Ok(())
    }

    /// Removes the controller that came last, from the quorum and from the machine.
    ///
    /// # Errors
    /// When the cloud refuses, or it cannot be ended.
    pub async fn dismiss_last(&mut self) -> anyhow::Result<()> {
        let last = self.size() - 1;
        self.remove_controller(last).await?;
        if self.should_run(last) {
            self.terminate(last)?;
        }
        let member = self.controllers.pop();
        member.map_or(Ok(()), |member| Ok(std::fs::remove_dir_all(member.data)?))
    }

    /// Waits until the members of the quorum are as many as the controllers here, and all vote.
    ///
    /// # Errors
    /// When they do not within the patience.
    pub async fn all_vote(&self, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        let mut seen = Vec::new();
        while Instant::now() < deadline {
            for controller in (0..self.size()).filter(|controller| self.should_run(*controller)) {
                let Some(status) = self.status(controller).await else { continue };
                seen = status.controllers.iter().map(|c| (c.id, c.role.clone())).collect();
                let votes =
                    |id: u64| seen.iter().any(|(other, role)| *other == id && (role == "voter" || role == "leader"));
                if seen.len() == self.size() && self.controllers.iter().all(|member| votes(member.id)) {
                    return Ok(());
                }
            }
            tokio::time::sleep(super::LOOK_AGAIN).await;
        }
        anyhow::bail!("not all {} controllers voted within {patience:?}; members: {seen:?}", self.size())
    }
}
